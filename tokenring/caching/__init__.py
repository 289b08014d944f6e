"""A key/value cache that is spread over ranks: where new rows go, chunks and new tokens against it, partials put together."""
