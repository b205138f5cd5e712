"""The rooms of the web server: what a request may ask, who answers it, how the answer is told."""
