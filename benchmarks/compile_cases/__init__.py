"""What the launchers of each family of operations launch, for `compile_report.py`.

CASES lists (name, kernel, arguments, options) and, where not every GPU gets it, the targets. `arguments` gives each
parameter of the kernel its type ("*bf16", "i32", "fp32"; "i64?" is one that 16 need not divide) or its constexpr value,
`options` what the compiler is told.
"""
