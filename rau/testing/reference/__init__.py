"""What is right: the oracle, its bounds, and real attention to merge parts of.

The rule of this room: it imports nothing of what it judges, neither layouts nor validator nor arithmetic; of rau it takes
the triple AttentionState alone. Geometry is plain transposes and loops, so that a mistake there cannot hide itself.
"""
