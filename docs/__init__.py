"""The documentation: pages, and in `generate` what makes the site of them."""
