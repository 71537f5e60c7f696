"""Pictures compared by their features: networks that others trained, and the metrics defined on these."""
