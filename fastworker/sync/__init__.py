"""Other hosts of the network (PLC, PDSes): identities, repositories, repair."""
