"""What the command line tells people, and how it asks a running router."""
