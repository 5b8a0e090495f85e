"""What joins processes of several hosts: keys, sockets, and the two ends of a link."""
