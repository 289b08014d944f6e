"""What a topology is made of: routes, fair shares, costs, files."""
