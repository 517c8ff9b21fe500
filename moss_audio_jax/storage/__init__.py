"""Files on a disk of this machine or on Google Cloud Storage.

paths           gs:// and local paths, files written whole, files that grow
retries         tries again while storage fails for a moment
user_cache      directory of what is kept for later calls
hub             models of the Hugging Face hub by name
json_files      reads JSON that others wrote
foreign_files   recognizes files that were given by mistake
"""
