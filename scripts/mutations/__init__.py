"""Known bugs, to be planted one at a time: how many of them does the simulation find?"""
