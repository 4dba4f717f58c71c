"""LaTeX → pairs of picture and caption: files, macros, conditions, tree, pairing; captions as readable text."""
