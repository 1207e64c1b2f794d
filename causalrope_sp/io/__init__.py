"""Media files in and out."""
