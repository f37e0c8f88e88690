"""What the documentation site is built of besides its pages: links out of `docs/`, and pages made from the code."""
