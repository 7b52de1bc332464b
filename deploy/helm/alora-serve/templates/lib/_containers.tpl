{{/* What every container is allowed: nothing (the restricted Pod Security standard, and a read-only root). */}}
{{- define "alora-serve.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
{{- end }}

{{- define "alora-serve.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.podSecurity }}
{{- if .runAsUser }}
runAsUser: {{ int64 .runAsUser }}
{{- end }}
{{- if .runAsGroup }}
runAsGroup: {{ int64 .runAsGroup }}
{{- end }}
{{- if .fsGroup }}
fsGroup: {{ int64 .fsGroup }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Fields that every pod has, whatever runs in it. */}}
{{- define "alora-serve.podBase" -}}
serviceAccountName: {{ include "alora-serve.serviceAccountName" . }}
automountServiceAccountToken: false
# Kubernetes would set ALORA_..._PORT for Services of this release, and the services refuse what they do not know.
enableServiceLinks: false
securityContext:
  {{- include "alora-serve.podSecurity" . | nindent 2 }}
{{- with .Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/*
Probes speak to the plain-text port of health alone, which needs no certificate. "liveness" says that the process
answers, and its engine has not hung for over a minute, whatever becomes of store, model or peers; "startup" that it has
loaded and takes calls: until weights are read and hashed, the start-up probe waits.
*/}}
{{- define "alora-serve.probes" -}}
startupProbe:
  grpc: {port: 50052, service: startup}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ max 1 (div (int .values.startupSeconds) 5) }}
livenessProbe:
  grpc: {port: 50052, service: liveness}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc: {port: 50052, service: {{ include "alora-serve.grpcService" . }}}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 3
{{- end }}

{{- define "alora-serve.grpcService" -}}
{{- if include "alora-serve.isFront" . -}}
openai_front
{{- else -}}
{{- $services := dict "router" "Alora" "base-prefill" "BasePrefill" "adapter-decode" "AdapterDecode" -}}
alora_serve.v1.{{ index $services .component }}Service
{{- end -}}
{{- end }}

{{/* The container of a service. */}}
{{- define "alora-serve.container" -}}
name: {{ .component }}
image: {{ include "alora-serve.image" (dict "ctx" .ctx "image" .values.image) }}
imagePullPolicy: {{ .values.image.pullPolicy }}
ports:
  {{- if include "alora-serve.isFront" . }}
  - {name: http, containerPort: 8000}
  {{- else }}
  - {name: grpc, containerPort: 50051}
  {{- end }}
  - {name: health, containerPort: 50052}
  - {name: metrics, containerPort: 9090}
env:
  {{- include "alora-serve.env" . | nindent 2 }}
{{ include "alora-serve.probes" . }}
lifecycle:
  preStop:
    # Not the sleep action, which Kubernetes 1.28 lacks.
    exec: {command: [sleep, {{ .values.preStopSeconds | toString | quote }}]}
resources:
  {{- include "alora-serve.resources" . | nindent 2 }}
securityContext:
  {{- include "alora-serve.containerSecurity" .ctx | nindent 2 }}
volumeMounts:
  {{- include "alora-serve.volumeMounts" . | nindent 2 }}
{{- end }}

{{/* As given; model services get the GPUs too. */}}
{{- define "alora-serve.resources" -}}
{{- $resources := deepCopy .values.resources -}}
{{- $gpu := .ctx.Values.gpu -}}
{{- if and $gpu.enabled (include "alora-serve.isModelService" .) -}}
{{- $_ := set $resources "limits" (merge (dict $gpu.resource (int $gpu.count)) ($resources.limits | default dict)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}
