from .attention import attention_trace

__all__ = ['attention_trace']
