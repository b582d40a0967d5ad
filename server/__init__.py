"""What happens on the server."""
