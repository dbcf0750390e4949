"""What the suite measures: protocols, throughput, scaling, and the plain reference of the method."""
