"""The command line: one file a command. What a command needs that is slow to import, it imports when it runs."""
