"""What a host and a running cluster look like to who is called when something is wrong."""
