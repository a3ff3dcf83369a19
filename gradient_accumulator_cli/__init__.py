"""The command line and the demonstration: above the library, and not needed by it.

Nothing here imports Keras before the command has chosen the backend.
"""
