"""Lead candidates from their proposal to their result; the lock is that of `nas.Search`."""
