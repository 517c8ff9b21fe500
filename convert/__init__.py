"""Between the released PyTorch files and Orbax checkpoints, in both directions, with proof that nothing changed."""
