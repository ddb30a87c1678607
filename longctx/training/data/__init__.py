"""The data of training: rows of files, as packed sequences of tokens."""
