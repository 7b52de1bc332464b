{{/*
Who may speak to whom: clients to the router and the HTTP front door, this one to the router, the router to the model services, these to the store, Prometheus to all;
all to name servers and to where traces go. Probes come from the node, which network policies let through.
*/}}
{{- define "alora-serve.networkPolicy" -}}
{{- $policy := .ctx.Values.networkPolicy -}}
{{- if $policy.enabled -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
{{ include "alora-serve.metadata" . }}
spec:
  # No peers, no from or to, which Kubernetes reads as everywhere.
  podSelector:
    matchLabels:
      {{- include "alora-serve.selectorLabels" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
  ingress:
    - ports: [{port: {{ include "alora-serve.port" . }}, protocol: TCP}]
      {{- if include "alora-serve.isFront" . }}
      {{- with $policy.httpClients }}
      from:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- else if eq .component "router" }}
      {{- with $policy.clients }}
      from:
        {{- toYaml . | nindent 8 }}
        {{- $own := $.ctx.Values.openaiFront.enabled | ternary (list "test" "openai-front") (list "test") }}
        {{- include "alora-serve.podPeers" (dict "ctx" $.ctx "components" $own) | nindent 8 }}
      {{- end }}
      {{- else }}
      from:
        {{- include "alora-serve.podPeers" (dict "ctx" .ctx "components" (list "router")) | nindent 8 }}
      {{- end }}
    - ports: [{port: 9090, protocol: TCP}]
      {{- with $policy.prometheus }}
      from:
        {{- toYaml . | nindent 8 }}
      {{- end }}
  egress:
    # 5353 as well: policies see the port of the pod behind a Service, and OpenShift's name servers listen there.
    - ports:
        - {port: 53, protocol: UDP}
        - {port: 53, protocol: TCP}
        - {port: 5353, protocol: UDP}
        - {port: 5353, protocol: TCP}
      {{- with $policy.dns }}
      to:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- with $policy.otlp.ports }}
    - ports: {{ include "alora-serve.tcpPorts" . }}
      {{- with $policy.otlp.to }}
      to:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- end }}
    {{- if include "alora-serve.isFront" . }}
    - ports: [{port: 50051, protocol: TCP}]
      to:
        {{- include "alora-serve.podPeers" (dict "ctx" .ctx "components" (list "router")) | nindent 8 }}
    {{- else if eq .component "router" }}
    - ports: [{port: 50051, protocol: TCP}]
      to:
        {{- include "alora-serve.podPeers" (dict "ctx" .ctx "components" (list "base-prefill" "adapter-decode")) | nindent 8 }}
    {{- else }}
    {{- if eq .ctx.Values.store.type "valkey" }}
    - ports: [{port: 6379, protocol: TCP}]
      to:
        {{- include "alora-serve.podPeers" (dict "ctx" .ctx "components" (list "store")) | nindent 8 }}
    {{- else if eq .ctx.Values.store.type "external" }}
    - ports: {{ include "alora-serve.tcpPorts" $policy.store.ports }}
      {{- with $policy.store.to }}
      to:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- end }}
    {{- if include "alora-serve.downloads" . }}
    # An init container downloads.
    - ports: [{port: 443, protocol: TCP}]
    {{- end }}
    {{- end }}
    {{- with $policy.extraEgress }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
{{- end }}

{{/* Pods of this release. (dict "ctx" $ "components" (list "router")) */}}
{{- define "alora-serve.podPeers" -}}
{{- $ctx := .ctx -}}
{{- range $index, $component := .components }}
{{- if $index }}{{ "\n" }}{{ end -}}
- podSelector:
    matchLabels:
      {{- include "alora-serve.selectorLabels" (dict "ctx" $ctx "component" $component) | nindent 6 }}
{{- end }}
{{- end }}

{{- define "alora-serve.tcpPorts" -}}
{{- $ports := list -}}
{{- range . }}{{ $ports = append $ports (dict "port" (int .) "protocol" "TCP") }}{{ end -}}
{{- toJson $ports -}}
{{- end }}

{{- define "alora-serve.downloads" -}}
{{- range (include "alora-serve.sources" . | fromJson).sources }}
{{- if has .item.source (list "hub" "s3") }}true{{ end }}
{{- end -}}
{{- end }}
