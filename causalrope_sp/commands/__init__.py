"""The commands, a file each. What a command needs that is slow to import, it imports when it runs."""
