"""The command line, one file a command. Commands import slow modules inside their functions, so that --help is fast."""
