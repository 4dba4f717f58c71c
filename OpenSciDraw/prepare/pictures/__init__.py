"""Picture files, PDF, SVG and TikZ → PNG or JPEG, each in a bounded process."""
