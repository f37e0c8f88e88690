"""Publishing: model cards, staging, secret scan, push and pull."""
