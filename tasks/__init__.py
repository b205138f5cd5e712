"""Tasks: what the chat stages are trained on and evaluated with. No torch."""
