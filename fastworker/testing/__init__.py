"""The simulated network, its relay, and the state law as a model.

Shipped, because `fastworker demo` and operators rehearsing a fault use it. Never imports
`fastworker.event` or `fastworker.table`: a shared bug could hide.
"""
