"""Publishing: cards, staging, secret scan, push and pull."""
