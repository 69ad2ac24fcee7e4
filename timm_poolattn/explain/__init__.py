from .attention import attention_trace, dead_gates

__all__ = ['attention_trace', 'dead_gates']
