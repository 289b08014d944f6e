"""What several methods choose with: coverage, diversity, clusters, pairs."""
