"""What the benchmarks are made of: processes under measurement, contenders, workloads, ratios and the report.

A **contender** moves bytes: AMST in one of its ways, or a **peer**, a program that users would pick instead. A **run**
is one contender doing one job once; a **round** is every contender of a workload after the other.
"""
