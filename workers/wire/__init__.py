"""What routers and workers say to each other: its values, their protobuf messages, and the streams' numbering."""
