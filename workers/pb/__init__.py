"""Protobuf messages generated from proto/; only wire.py and the gRPC layers import them."""
