"""The pipeline: loads models, generates videos from prompts, and decodes them chunk by chunk."""
