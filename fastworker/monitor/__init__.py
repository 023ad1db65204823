"""What others can see: HTTP, metrics, the status page, readiness."""
