"""The server: one engine that owns the pipeline, live sessions over WebSockets, jobs, and the page."""
