"""The command line and the demonstration. The library does not need them.

Nothing here imports Keras before the command has chosen the backend.
"""
