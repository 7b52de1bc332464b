{{/*
A certificate of cert-manager's.
(dict "ctx" $ "component" "base-prefill" "certificate" "base-prefill" "names" list "usages" list "issuerRef" dict)
*/}}
{{- define "alora-serve.certificate" -}}
{{- $tls := .ctx.Values.tls -}}
{{- if and $tls.enabled $tls.certManager.enabled -}}
apiVersion: cert-manager.io/v1
kind: Certificate
metadata:
  name: {{ include "alora-serve.fullname" .ctx }}-{{ .certificate }}
  namespace: {{ .ctx.Release.Namespace }}
  labels:
    {{- include "alora-serve.labels" . | nindent 4 }}
spec:
  secretName: {{ include "alora-serve.tlsSecret" . }}
  duration: {{ $tls.certManager.duration }}
  renewBefore: {{ $tls.certManager.renewBefore }}
  privateKey: {algorithm: ECDSA, size: 256, rotationPolicy: Always}
  usages: {{ toJson .usages }}
  dnsNames:
    {{- toYaml (.names | uniq) | nindent 4 }}
  issuerRef:
    {{- .issuerRef | default (include "alora-serve.issuerRef" .ctx | fromYaml) | toYaml | nindent 4 }}
{{- end }}
{{- end }}

{{- define "alora-serve.issuerRef" -}}
{{- $own := dict "kind" "Issuer" "name" (printf "%s-ca" (include "alora-serve.fullname" .)) -}}
{{- .Values.tls.certManager.issuerRef | default $own | toYaml }}
{{- end }}

{{/* All names of a Service, shortest first. (dict "ctx" $ "name" "alora-serve-router") */}}
{{- define "alora-serve.serviceNames" -}}
{{- $full := printf "%s.%s" .name .ctx.Release.Namespace -}}
{{- list .name $full (printf "%s.svc" $full) (printf "%s.svc.cluster.local" $full) | toJson -}}
{{- end }}

{{/* A model service's: a server to the router, a client to the store. */}}
{{- define "alora-serve.modelCertificate" -}}
{{- $service := dict "ctx" .ctx "name" (include "alora-serve.name" .) -}}
{{- $names := include "alora-serve.serviceNames" $service | fromJsonArray -}}
{{- $names = append $names (include "alora-serve.peerServerName" .ctx) -}}
{{- $own := dict "certificate" .component "names" $names "usages" (list "server auth" "client auth") -}}
{{- include "alora-serve.certificate" (merge $own .) -}}
{{- end }}
