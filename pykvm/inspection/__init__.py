"""Inspection of a running machine: debugger, page walks, reports and metrics.

Everything here works on what `pykvm.inspection.machine.Inspectable` describes, so that any machine
can be inspected that has vCPUs, memory and a `pykvm.inspection.vcpu_gate.VcpuGate`.
"""
