"""What runs inside the sandbox; `nanochat.execution` is its only caller. Standard library only."""
