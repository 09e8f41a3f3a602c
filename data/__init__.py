"""From rows on disk to batches: records, formats, encoding, packing, loading, and synthetic scenes."""
