"""What people run: `fastpref train`, `verify`, `plan` and `bench`, and the demo.

These may need every extra; nothing outside this folder imports them.
"""
