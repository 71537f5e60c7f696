"""From images, captions and features to numbers."""
