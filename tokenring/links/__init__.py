"""What a topology is made of: routes, fair shares, costs, files; and the probe that measures one."""
