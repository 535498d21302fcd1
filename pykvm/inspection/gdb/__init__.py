"""A remote stub for GDB: registers, memory, breakpoints, watchpoints and steps of a machine.

`pykvm.inspection.gdb.server.GdbServer` listens, `session.Session` answers a client's packets, and
`execution.Execution` stops and resumes the machine.

Source: "Debugging with GDB", appendix E (Remote Serial Protocol) and appendix G (Target
Descriptions).
"""
