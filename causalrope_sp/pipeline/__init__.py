"""Text in, frames out."""
