"""Questions that are answered with times.

The ones for sentences and speakers are those that MOSS-Audio's authors publish, word for word; the one for words is the
first of them with words in it; the one for events is of this port's training objectives.
"""

PROMPTS = {
    "sentences": (
        "Transcribe the audio into sentence-level timestamps using the format [xx.xx]text[yy.yy], where xx.xx and "
        "yy.yy are millisecond-precision timestamps rounded to two decimal places. Concatenate consecutive segments "
        "without breaks, for example [0.00]hello there[2.01][2.01]the weather is nice today[4.32]. Exclude any "
        "additional content such as explanations, headings, or annotations."
    ),
    "words": (
        "Transcribe the audio into word-level timestamps using the format [xx.xx]text[yy.yy], where xx.xx and yy.yy "
        "are millisecond-precision timestamps rounded to two decimal places. Concatenate consecutive segments without "
        "breaks, for example [0.00]hello[0.31][0.35]there[0.80]. Exclude any additional content such as explanations, "
        "headings, or annotations."
    ),
    "speakers": (
        "Transcribe the audio into text. Each sentence should begin with a start timestamp and a speaker label ([S01], "
        "[S02], [S03], …), followed by the corresponding spoken content, and end with an end timestamp to clearly "
        "indicate the time span of that sentence."
    ),
    "events": "List the sounds with their start and end times.",
}
