"""What is measured on a picture and its caption, and near-duplicates."""
