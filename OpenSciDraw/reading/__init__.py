"""What a picture shows, read by computer vision and OCR: shapes, arrows, texts, kind, share of text.

May use: drawn.
"""
