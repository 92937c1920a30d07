"""What a command prints: results to renderables."""
