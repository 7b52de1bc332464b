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
    {{- with include "alora-serve.otlpPorts" .ctx | fromJsonArray }}
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
    - ports: {{ include "alora-serve.storePorts" .ctx | fromJsonArray | include "alora-serve.tcpPorts" }}
      {{- with $policy.store.to }}
      to:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- end }}
    {{- with include "alora-serve.downloadPorts" . | fromJsonArray }}
    # An init container downloads.
    - ports: {{ include "alora-serve.tcpPorts" . }}
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
{{- range . }}{{ $ports = append $ports (int .) }}{{ end -}}
{{- $rules := list -}}
{{- range uniq $ports }}{{ $rules = append $rules (dict "port" . "protocol" "TCP") }}{{ end -}}
{{- toJson $rules -}}
{{- end }}

{{/* Ports of the hosts that a URL names, as JSON: none of none. (dict "url" "redis://a:7000,b/0" "default" 6379) */}}
{{- define "alora-serve.portsOf" -}}
{{- $ports := list -}}
{{- if .url -}}
{{- $hosts := regexFind "^[^/?#]*" (regexReplaceAll "^[a-z0-9+]+://" .url "") -}}
{{- range splitList "," (regexReplaceAll "^.*@" $hosts "") -}}
{{- $ports = append $ports (regexFind ":[0-9]+$" . | trimPrefix ":" | default $.default | int) -}}
{{- end -}}
{{- end -}}
{{- toJson $ports -}}
{{- end }}

{{- define "alora-serve.otlpPorts" -}}
{{- $collector := include "alora-serve.portsOf" (dict "url" .Values.tracing.endpoint "default" 443) | fromJsonArray -}}
{{- concat .Values.networkPolicy.otlp.ports $collector | toJson -}}
{{- end }}

{{/* Sentinels tell where the store is, and nodes of a Cluster where others are: so the values' ports stay admitted. */}}
{{- define "alora-serve.storePorts" -}}
{{- $url := .Values.store.external.url -}}
{{- $default := contains "+sentinel:" $url | ternary 26379 6379 -}}
{{- $named := include "alora-serve.portsOf" (dict "url" $url "default" $default) | fromJsonArray -}}
{{- concat .Values.networkPolicy.store.ports $named | toJson -}}
{{- end }}

{{/* What init containers of a component need. Those of source demo copy from an image. */}}
{{- define "alora-serve.downloadPorts" -}}
{{- $ports := list -}}
{{- range (include "alora-serve.sources" . | fromJson).sources -}}
{{- if has .item.source (list "hub" "s3") -}}
{{- $url := (index .item .item.source).endpoint | default "https://" -}}
{{- $default := hasPrefix "http://" $url | ternary 80 443 -}}
{{- $ports = concat $ports (include "alora-serve.portsOf" (dict "url" $url "default" $default) | fromJsonArray) -}}
{{- end -}}
{{- end -}}
{{- toJson $ports -}}
{{- end }}
